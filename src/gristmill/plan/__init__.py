"""Estimates of memory, traffic and time of a training before it runs. Uses no device."""
