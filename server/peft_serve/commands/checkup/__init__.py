"""What `doctor` looks at, one module for each thing it can look at. Each gives findings and changes nothing."""
