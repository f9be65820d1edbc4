"""What is particular to a family of models, one small file each."""
