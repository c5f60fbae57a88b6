"""Helpers that know nothing about models: images, pages, image pool, checkpoints, loggers."""
