module orrery/bench

go 1.19
