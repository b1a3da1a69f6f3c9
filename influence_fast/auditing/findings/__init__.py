"""What an audit says of each training row: label, kind, and the evidence."""
