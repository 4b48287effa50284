"""What runs rows: this process, several, or a cluster."""
