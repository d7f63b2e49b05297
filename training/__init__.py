"""Training: the epoch, a run's files, several processes, adversarial images, the report."""
