"""`ray-ep status`, `placement`, `rebalance`, `scale`, `drain`, `checkpoint`, `pause`, `resume`, `stop`, `top`."""
