"""Studies: many trainings that answer one question, built on train.run."""
