"""Training: the epoch, the files of a run, several processes, adversarial images, the report."""
