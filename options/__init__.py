"""The command line: `TrainOptions` and `TestOptions`, which extend `BaseOptions`."""
