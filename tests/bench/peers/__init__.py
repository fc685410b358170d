"""What a flow team could pick instead: one module for each, with its worker, its settings and its way to enqueue."""
