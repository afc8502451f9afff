"""Parts that more than one mixer or model uses."""
