module orrery/gorace

go 1.19
