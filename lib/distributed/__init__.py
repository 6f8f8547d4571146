"""What acts on other ranks or on partitioned state: process groups, loading at every stage, the optimizer, ZeRO's
state, the export."""
