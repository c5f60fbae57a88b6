"""Helpers that know nothing about models: pictures, pages, image pool, checkpoints, loggers."""
