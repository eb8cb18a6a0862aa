"""Job folders that were written for NVFLARE, read as fedloom's: `table` says what stands for what."""
