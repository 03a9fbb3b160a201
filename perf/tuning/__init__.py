"""The parts of tune.py: what is tried, when it is believed, and the file it goes to."""
