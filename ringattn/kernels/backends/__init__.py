"""The backends, one file each: adapters of flash kernels to the contract of `ringattn.kernels.spec`."""
