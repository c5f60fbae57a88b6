"""What imports no other package: images, pages, image pool, and the subpackages of a run."""
