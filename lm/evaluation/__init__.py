"""What a trained model says: scores of given text, generated text, and numbers with intervals."""
