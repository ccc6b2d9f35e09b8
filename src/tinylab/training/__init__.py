"""One run: optimiser steps, averages, tests, and the loop around them."""
