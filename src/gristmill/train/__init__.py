"""Training: a visible loop over pure pieces.

The loop needs neither MLflow nor the libraries that recipes need, and tracking is never in its way.
"""
