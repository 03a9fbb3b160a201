"""The layers that are compared: their shapes, what is compared, and whether it is right."""
