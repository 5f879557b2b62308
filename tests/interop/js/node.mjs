// js-libp2p as an interop peer. One JSON object per line on stdout, one task per line on stdin.
//   node --import ./polyfill.mjs node.mjs listen [OPTION…]             a free loopback port: {ready, id, addrs}
//   node --import ./polyfill.mjs node.mjs dial ADDR [TASK…] [OPTION…]  {connected, encryption, muxer}, then the tasks'
// Options: --key Ed25519|RSA|secp256k1, --host IP, --hurry MS (keepalives this often, monitor pings every 20th time),
// --dht server|client, --autonat 1|2, --circuit (dials through relays), --at ADDR (listens at that relay, too),
// --relay (is one, without limits).
// Tasks, with whoever connected last:
//   connect:ADDR | ping | identify | book | echo:BYTES | streams:COUNT | digest:BYTES | goodbye:BYTES
//   push:ID | knows:ID | bench
// Tasks of its AutoNAT (--autonat): reachable:ADDR (waits until peers have verified it) | verify:ADDR (has the peer dial it)
// Tasks of its DHT (--dht): table:COUNT (waits for so many) | find:PEER | closest:KEY | put:KEY,VALUE | get:KEY |
//   provide:MULTIHASH | providers:MULTIHASH; keys and values are hexadecimal
// Protocols it answers:
//   echo     u8 kind, u32 length, payload; kind 0 comes back, kind 1 is swallowed, kind 2 is answered by 5 zeros
//   digest   all until the dialer's end; then the sha256 comes back: the dialer ends its direction first
//   goodbye  "bye" and our end; then the dialer's bytes, whose number is printed: the listener ends first
import { createHash, randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { autoNAT } from '@libp2p/autonat'
import { autoNATv2 } from '@libp2p/autonat-v2'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { identify, identifyPush } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'

const ECHO = '/swarmnode/test-echo/1.0.0'
const DIGEST = '/swarmnode/test-digest/1.0.0'
const GOODBYE = '/swarmnode/test-goodbye/1.0.0'
const KAD = '/swarmnode/kad/1.0.0'
const RAW = 0x55
const MANY = { maxInboundStreams: 1024, maxOutboundStreams: 1024, runOnLimitedConnection: true }
const MAX_BUFFER = 64 << 20
const HEADER = 5
const say = value => console.log(JSON.stringify(value))

const { values: options, positionals: [mode, target, ...tasks] } = parseArgs({
  allowPositionals: true,
  options: {
    key: { type: 'string', default: 'Ed25519' },
    host: { type: 'string', default: '127.0.0.1' },
    hurry: { type: 'string' },
    dht: { type: 'string' },
    autonat: { type: 'string' },
    circuit: { type: 'boolean' },
    at: { type: 'string' },
    relay: { type: 'boolean' }
  }
})
const hurry = options.hurry && Number(options.hurry)
const services = { identify: identify(), identifyPush: identifyPush(), ping: ping() }
if (options.dht) {
  services.dht = kadDHT({
    protocol: KAD,
    clientMode: options.dht === 'client',
    peerInfoMapper: passthroughMapper, // tell loopback addresses
    initialQuerySelfInterval: 50
  })
}
if (options.autonat) services.autonat = options.autonat === '1' ? autoNAT() : autoNATv2()
if (options.relay) services.relay = circuitRelayServer({ reservations: { applyDefaultLimit: false } })
const listen = mode === 'listen' ? [`/ip${options.host.includes(':') ? 6 : 4}/${options.host}/tcp/0`] : []
if (options.at) listen.push(`${options.at}/p2p-circuit`)
const node = await createLibp2p({
  privateKey: await generateKeyPair(options.key, 2048),
  addresses: { listen },
  transports: options.circuit || options.at ? [tcp(), circuitRelayTransport()] : [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux(hurry ? { keepAliveInterval: hurry } : {})],
  services,
  // its pings must not overlap: js allows one at a time, and takes a refusal for a dead connection
  connectionMonitor: hurry ? { pingInterval: 20 * hurry } : {},
  connectionGater: { denyDialMultiaddr: () => false }
})

let peer // who connected last
const identified = new Map()
node.addEventListener('connection:open', event => { peer = event.detail.remotePeer })
node.addEventListener('peer:identify', event => identified.set(event.detail.peerId.toString(), event.detail))

async function eventually (look) {
  for (;;) {
    const found = await look()
    if (found) return found
    await new Promise(resolve => setTimeout(resolve, 5))
  }
}

async function readAll (bytes) {
  const parts = []
  for (;;) {
    const part = await bytes.read()
    if (part == null) return Buffer.concat(parts)
    parts.push(part.subarray())
  }
}

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
}, MANY)

await node.handle(DIGEST, async stream => {
  const bytes = byteStream(stream, { maxBufferSize: MAX_BUFFER })
  await bytes.write(createHash('sha256').update(await readAll(bytes)).digest())
  await stream.close()
})

await node.handle(GOODBYE, async stream => {
  const bytes = byteStream(stream, { maxBufferSize: MAX_BUFFER })
  await bytes.write(Buffer.from('bye'))
  await stream.close()
  say({ received: (await readAll(bytes)).length })
})

function message (kind, payload) {
  const out = Buffer.alloc(HEADER + payload.length)
  out.writeUInt8(kind, 0)
  out.writeUInt32BE(payload.length, 1)
  payload.copy(out, HEADER)
  return out
}

async function open (protocol) {
  const stream = await node.dialProtocol(peer, protocol, MANY)
  return { stream, bytes: byteStream(stream, { maxBufferSize: MAX_BUFFER }) }
}

async function echo (bytes, payload) {
  await bytes.write(message(0, payload))
  await bytes.read({ bytes: HEADER })
  return Buffer.from((await bytes.read({ bytes: payload.length })).subarray())
}

async function oneEcho (size) {
  const { stream, bytes } = await open(ECHO)
  const payload = randomBytes(size)
  const same = Buffer.compare(payload, await echo(bytes, payload)) === 0
  await stream.close()
  return same
}

async function digest (size) {
  const { stream, bytes } = await open(DIGEST)
  const payload = randomBytes(size)
  await bytes.write(payload)
  await stream.close()
  return Buffer.compare(await readAll(bytes), createHash('sha256').update(payload).digest()) === 0
}

async function goodbye (size) {
  const { stream, bytes } = await open(GOODBYE)
  const heard = (await readAll(bytes)).toString()
  await bytes.write(randomBytes(size))
  await stream.close()
  return heard
}

async function bench () {
  const { bytes } = await open(ECHO)
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
    say({ mark: size }) // whoever runs us notes the listener's CPU time here and at the next mark
    const cpu = process.cpuUsage()
    const start = performance.now()
    for (let i = 0; i < count; i++) await bytes.write(data)
    await bytes.write(Buffer.from([2, 0, 0, 0, 0]))
    await bytes.read({ bytes: HEADER })
    const used = process.cpuUsage(cpu)
    say({ mark: size })
    out[`bulk_${size}_mb_s`] = size * count / (performance.now() - start) / 1e3
    out[`bulk_${size}_mb`] = size * count / 1e6
    out[`bulk_${size}_cpu_us_per_mb`] = (used.user + used.system) / (size * count / 1e6)
  }
  return out
}

async function book () {
  const found = await node.peerStore.get(peer)
  return {
    certified: found.addresses.filter(a => a.isCertified).map(a => a.multiaddr.toString()),
    uncertified: found.addresses.filter(a => !a.isCertified).map(a => a.multiaddr.toString()),
    protocols: found.protocols,
    agent: Buffer.from(found.metadata.get('AgentVersion') ?? []).toString()
  }
}

// js identifies by itself, one stream at a time: wait for that instead of asking again
async function whatIdentifySaid () {
  const found = await eventually(() => identified.get(peer?.toString()))
  return {
    id: found.peerId.toString(),
    agent: found.agentVersion,
    protocols: found.protocols,
    addrs: found.listenAddrs.map(a => a.toString()),
    observed: found.observedAddr?.toString(),
    certified: found.signedPeerRecord?.addresses.map(a => a.toString())
  }
}

async function pings () {
  const times = []
  for (let i = 0; i < 3; i++) times.push(await node.services.ping.ping(peer))
  return times
}

const fromHex = text => new Uint8Array(Buffer.from(text, 'hex'))
const toHex = bytes => Buffer.from(bytes).toString('hex')
const place = found => ({ id: found.id.toString(), addrs: found.multiaddrs.map(a => a.toString()) })
const cid = text => CID.createV1(RAW, Digest.decode(fromHex(text)))

async function all (events, name) {
  const found = []
  for await (const event of events) if (event.name === name) found.push(event)
  return found
}

async function put (key, value) {
  const answers = await all(node.services.dht.put(fromHex(key), fromHex(value)), 'PEER_RESPONSE')
  return answers.filter(one => one.record != null && toHex(one.record.value) === value).map(one => one.from.toString())
}

async function performInDht (what, argument) {
  const dht = node.services.dht
  switch (what) {
    case 'table':
      return { table: await eventually(() => dht.routingTable.size >= Number(argument) && dht.routingTable.size) }
    case 'find': {
      const found = await all(dht.findPeer(peerIdFromString(argument), { useCache: false }), 'FINAL_PEER')
      return { find: place(found[0].peer) }
    }
    case 'closest': {
      const found = await all(dht.getClosestPeers(fromHex(argument)), 'FINAL_PEER')
      return { closest: found.map(event => event.peer.id.toString()) }
    }
    case 'put': return { put: await put(...argument.split(',')) }
    case 'get': {
      const found = await all(dht.get(fromHex(argument)), 'VALUE')
      return { get: found.length > 0 ? toHex(found[0].value) : null }
    }
    case 'provide': {
      const told = await all(dht.provide(cid(argument)), 'PEER_RESPONSE')
      return { provide: told.filter(one => one.messageName === 'ADD_PROVIDER').map(one => one.from.toString()) }
    }
    case 'providers': {
      const found = await all(dht.findProviders(cid(argument)), 'PROVIDER')
      return { providers: found.flatMap(event => event.providers.map(place)) }
    }
  }
}

// as its own topology does after identify, but for one address and now
async function verify (address) {
  const target = multiaddr(address)
  const [connection] = node.getConnections(peer)
  const service = node.services.autonat
  const client = service.client ?? service
  const found = { multiaddr: target, success: 0, failure: 0, networkSegments: [], verifyingPeers: new Set(), type: 'observed' }
  client.dialResults.clear()
  client.dialResults.set(target.toString(), found)
  const signal = AbortSignal.timeout(30_000)
  if (client === service) {
    await client.askPeerToVerify(connection, 'anywhere', { signal, multiaddr: target })
    return { success: found.success, failure: found.failure }
  }
  const nonce = BigInt(randomBytes(6).readUIntLE(0, 6)) // as its own: it takes larger ones for others
  client.nonces.add(nonce)
  await client.askPeerToVerify(connection, 'anywhere', nonce, { signal }).catch(() => {}) // it waits for more responses
  return { success: found.success, failure: found.failure, came: !client.nonces.has(nonce) }
}

async function perform (task) {
  const [what, argument] = [task.split(':', 1)[0], task.slice(task.indexOf(':') + 1)]
  if (what === 'connect') {
    peer = (await node.dial(multiaddr(argument))).remotePeer
    return { connected: argument }
  }
  await eventually(() => peer)
  switch (what) {
    case 'ping': return { ping: await pings() }
    case 'identify': return await whatIdentifySaid()
    case 'book': return await book()
    case 'echo': return { echo: await oneEcho(Number(argument)) }
    case 'streams': {
      const done = await Promise.all(Array.from({ length: Number(argument) }, () => oneEcho(1000)))
      return { streams: done.every(same => same) }
    }
    case 'digest': return { digest: await digest(Number(argument)) }
    case 'goodbye': return { goodbye: await goodbye(Number(argument)) }
    case 'push':
      await node.handle(argument, () => {})
      return { pushing: argument }
    case 'knows':
      await eventually(async () => (await book()).protocols.includes(argument))
      return { knows: argument }
    case 'bench': return await bench()
    case 'verify': return await verify(argument)
    case 'reachable':
      await eventually(() => node.getMultiaddrs().some(a => a.toString().startsWith(argument)))
      return { reachable: argument }
  }
  const done = options.dht && await performInDht(what, argument)
  if (!done) throw new Error(`no such task: ${task}`)
  return done
}

if (options.at) await eventually(() => node.getMultiaddrs().some(a => a.toString().includes('/p2p-circuit')))
if (mode === 'listen') {
  const told = node.getMultiaddrs() // with AutoNAT only verified ones
  const addrs = told.length > 0 ? told : node.components.transportManager.getAddrs()
  say({ ready: true, id: node.peerId.toString(), addrs: addrs.map(a => a.toString()) })
} else {
  const connection = await node.dial(multiaddr(target))
  say({ connected: true, id: node.peerId.toString(), encryption: connection.encryption, muxer: connection.multiplexer })
  for (const task of tasks) say(await perform(task))
}
process.on('SIGTERM', () => process.exit(0))
for await (const line of createInterface({ input: process.stdin })) say(await perform(line))
await node.stop()
