"""What a trained model says: scores of given text, text of its own, and numbers with intervals."""
