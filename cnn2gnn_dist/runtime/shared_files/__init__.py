"""Files that several processes or hosts share: who may write, and whether the others see what was written."""
