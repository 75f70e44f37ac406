module orrery/demo

go 1.19
