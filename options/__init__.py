"""The command line: `TrainOptions` and `TestOptions` over what `BaseOptions` has for both."""
