"""Training: a visible loop over pure pieces. Runs with torch alone; tracking is optional and never in its way."""
