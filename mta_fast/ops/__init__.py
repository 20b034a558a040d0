"""The ops: one file each with public function, input checks, autograd and dispatch."""
