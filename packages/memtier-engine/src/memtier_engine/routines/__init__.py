"""What runs beside a policy: commands at intervals and by what was paged out."""
