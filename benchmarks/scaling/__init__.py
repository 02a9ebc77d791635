"""What a step with stablekit costs as a function of model and machine, checked by counting."""
