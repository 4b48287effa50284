"""Where a step runs: one module a backend, all behind ``base.Backend``."""
