"""The commands of launch.sh that are processes of their own, before the ranks or alongside them."""
