"""A small semantic segmentation, trained by one process or several."""
