"""From files to batches: what a data set is (manifest), its files found and checked (layouts, reading, check), the demo data, and the way to a batch."""
