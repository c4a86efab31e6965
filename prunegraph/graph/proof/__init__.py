"""The proof that ends every analysis: the pruned network equals the masked one."""
