"""Commands beside the pipeline: data sets, export, other trainers' formats, sweeps, benchmarks."""
