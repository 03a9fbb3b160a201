"""A small semantic segmentation, trained on one process or several: data, network, arms, pictures."""
