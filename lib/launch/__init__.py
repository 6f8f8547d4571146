"""The commands of launch.sh that are processes of their own, before or beside the ranks."""
