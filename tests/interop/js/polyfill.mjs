// js-libp2p 3 is written for Node 22; on Node 20 this one function is all it misses.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
