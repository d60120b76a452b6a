"""What benchmarks/race is made of: documents and states for the peer (`features`), its training (`peer`), the table."""
