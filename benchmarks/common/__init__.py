"""What the benchmarks share: clock, report, inputs. No benchmark itself."""
