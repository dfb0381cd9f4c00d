"""From files to batches: what a data set is (manifest), the demo data (demo, phantom), and the way to a batch."""
