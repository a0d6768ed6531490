"""What a schedule takes: seconds and bytes."""
