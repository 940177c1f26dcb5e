"""Raw datasets into sharded ArrayRecord, by Apache Beam."""
