// js-libp2p as an interop peer. One JSON object per line on stdout.
//   node --import ./polyfill.mjs node.mjs listen          listens on a free loopback port: {ready, id, addrs}
//   node --import ./polyfill.mjs node.mjs dial ADDR WHAT  WHAT: ping | echo BYTES | identify | streams COUNT | bench
// Echo protocol: u8 kind, u32 length, payload; kind 0 comes back, kind 1 is swallowed, kind 2 is answered by 5 zeros.
import { randomBytes } from 'node:crypto'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify, identifyPush } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/swarmnode/test-echo/1.0.0'
const MAX_BUFFER = 64 << 20
const HEADER = 5
const say = value => console.log(JSON.stringify(value))

const node = await createLibp2p({
  addresses: { listen: process.argv[2] === 'listen' ? ['/ip4/127.0.0.1/tcp/0'] : [] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), identifyPush: identifyPush(), ping: ping() },
  connectionGater: { denyDialMultiaddr: () => false }
})

await node.handle(ECHO, async stream => {
  const bytes = byteStream(stream, { maxBufferSize: MAX_BUFFER })
  try {
    for (;;) {
      const header = (await bytes.read({ bytes: HEADER })).subarray()
      const view = new DataView(header.buffer, header.byteOffset, HEADER)
      const kind = view.getUint8(0)
      const length = view.getUint32(1)
      const payload = length > 0 ? await bytes.read({ bytes: length }) : null
      if (kind === 0) {
        await bytes.write(header)
        if (payload != null) await bytes.write(payload)
      } else if (kind === 2) {
        await bytes.write(new Uint8Array(HEADER))
      }
    }
  } catch {
    await stream.close().catch(() => {})
  }
}, { maxInboundStreams: 1024, maxOutboundStreams: 1024 })

function message (kind, payload) {
  const out = Buffer.alloc(HEADER + payload.length)
  out.writeUInt8(kind, 0)
  out.writeUInt32BE(payload.length, 1)
  payload.copy(out, HEADER)
  return out
}

async function open (address) {
  const stream = await node.dialProtocol(address, ECHO, { maxOutboundStreams: 1024 })
  return { stream, bytes: byteStream(stream, { maxBufferSize: MAX_BUFFER }) }
}

async function echo (bytes, payload) {
  await bytes.write(message(0, payload))
  await bytes.read({ bytes: HEADER })
  return Buffer.from((await bytes.read({ bytes: payload.length })).subarray())
}

async function oneEcho (address, size) {
  const { stream, bytes } = await open(address)
  const payload = randomBytes(size)
  const same = Buffer.compare(payload, await echo(bytes, payload)) === 0
  await stream.close()
  return same
}

async function bench (address) {
  const { bytes } = await open(address)
  const out = {}
  for (const [size, count] of [[32, 300], [16384, 500], [1 << 20, 20]]) {
    const payload = randomBytes(size)
    const times = []
    for (let i = 0; i < count; i++) {
      const start = performance.now()
      await echo(bytes, payload)
      times.push(performance.now() - start)
    }
    times.sort((a, b) => a - b)
    out[`echo_${size}_ms`] = times[times.length >> 1]
  }
  for (const [size, count] of [[16384, 4000], [1 << 20, 200]]) {
    const data = message(1, randomBytes(size))
    const cpu = process.cpuUsage()
    const start = performance.now()
    for (let i = 0; i < count; i++) await bytes.write(data)
    await bytes.write(Buffer.from([2, 0, 0, 0, 0]))
    await bytes.read({ bytes: HEADER })
    const used = process.cpuUsage(cpu)
    out[`bulk_${size}_mb_s`] = size * count / (performance.now() - start) / 1e3
    out[`bulk_${size}_cpu_us_per_mb`] = (used.user + used.system) / (size * count / 1e6)
  }
  return out
}

if (process.argv[2] === 'listen') {
  say({ ready: true, id: node.peerId.toString(), addrs: node.getMultiaddrs().map(a => a.toString()) })
} else {
  const address = multiaddr(process.argv[3])
  const [what, argument] = process.argv.slice(4)
  // js identifies by itself, one stream at a time: wait for that instead of asking again
  const identified = new Promise(resolve => node.addEventListener('peer:identify', event => resolve(event.detail)))
  const connection = await node.dial(address)
  say({ connected: true, encryption: connection.encryption, muxer: connection.multiplexer })
  if (what === 'ping') {
    const times = []
    for (let i = 0; i < 3; i++) times.push(await node.services.ping.ping(address))
    say({ ping: times })
  } else if (what === 'echo') {
    say({ echo: await oneEcho(address, Number(argument)) })
  } else if (what === 'streams') {
    const done = await Promise.all(Array.from({ length: Number(argument) }, () => oneEcho(address, 1000)))
    say({ streams: done.every(same => same) })
  } else if (what === 'identify') {
    const found = await identified
    say({
      id: found.peerId.toString(),
      agent: found.agentVersion,
      protocols: found.protocols,
      addrs: found.listenAddrs.map(a => a.toString()),
      observed: found.observedAddr?.toString()
    })
  } else if (what === 'bench') {
    say(await bench(address))
  }
  await node.stop()
}
process.on('SIGTERM', () => process.exit(0))
