"""The operations: one file each, with its kernel, its torch operator, its gradient and its public function."""
