"""Clock, report and inputs of the benchmarks; no benchmark itself."""
