"""What chapters look at beyond one pass: disturbed inputs, generated answers, benchmarks, drafts, classes."""
