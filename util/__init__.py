"""Helpers that know nothing about models: pictures, pages, history, checkpoints, views of a run."""
