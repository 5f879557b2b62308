"""A home router that opens ports on request: NAT-PMP, PCP, and UPnP's IGD, for tests.

Router is the mapping table and the two packet protocols, without sockets; run as a program it stands in a
namespace, where each mapping becomes a DNAT rule of nftables:

    python gateway.py LAN_IP OUTSIDE_IP [--speak pcp,pmp,igd] [--refuse CODE] [--lifetime S]

Written from the RFCs, apart from the code under test: nothing of it is imported here.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import re
import struct
import subprocess
import sys
import time

PORT = 5351
SSDP = ("239.255.255.250", 1900)
IGD = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
WAN_IP = "urn:schemas-upnp-org:service:WANIPConnection:1"


class Router:
    """The table of open ports. `opened` and `closed` are told (outer port, inner ip, inner port)."""

    def __init__(self, outside, *, speak=("pcp", "pmp"), refuse=0, lifetime=7200, opened=None, closed=None):
        self.outside = ipaddress.ip_address(outside)
        self.speak = speak
        self.refuse = refuse
        self.lifetime = lifetime
        self.table = {}
        self.started = 0.0
        self.asked = []
        self._opened = opened or (lambda *_: None)
        self._closed = closed or (lambda *_: None)

    def restart(self, now):
        """Power off and on: everything is forgotten, and the epoch starts anew."""
        for outer in list(self.table):
            self.close(outer)
        self.started = now

    def close(self, outer):
        ip, inner, _ = self.table.pop(outer)
        self._closed(outer, ip, inner)

    def expire(self, now):
        for outer in [outer for outer, (_, _, ends) in self.table.items() if ends <= now]:
            self.close(outer)

    def open(self, ip, inner, wanted, lifetime, now):
        """The outer port and the seconds granted."""
        self.expire(now)
        mine = next((outer for outer, (other, port, _) in self.table.items() if (other, port) == (ip, inner)), None)
        if lifetime == 0:
            if mine is not None:
                self.close(mine)
            return 0, 0
        outer = mine or next(port for port in range(wanted or 1024, 65536) if port not in self.table)
        granted = min(lifetime, self.lifetime)
        if mine is None:
            self._opened(outer, ip, inner)
        self.table[outer] = (ip, inner, now + granted)
        return outer, granted

    def answer(self, packet, client, now):
        """What comes back for a packet; None: nothing."""
        self.asked.append(packet)
        if packet[0] == 2 and "pcp" in self.speak:
            return self._pcp(packet, client, now)
        if packet[0] == 0 and "pmp" in self.speak:
            return self._pmp(packet, client, now)
        if packet[0] == 2 and "pmp" in self.speak and "quiet" not in self.speak:  # RFC 6886, 3.5
            return struct.pack("!BBHI", 0, 128, 1, int(now - self.started))
        return None

    def _pmp(self, packet, client, now):
        epoch = int(now - self.started)
        if packet[1] == 0:
            return struct.pack("!BBHI4s", 0, 128, self.refuse, epoch, self.outside.packed)
        inner, wanted, lifetime = struct.unpack("!HHI", packet[4:12])
        outer = granted = 0
        if not self.refuse:
            outer, granted = self.open(client, inner, wanted, lifetime, now)
        return struct.pack("!BBHIHHI", 0, 128 + packet[1], self.refuse, epoch, inner, outer, granted)

    def _pcp(self, packet, client, now):
        lifetime, sender = struct.unpack("!I16s", packet[4:24])
        nonce, protocol, inner, wanted, _ = struct.unpack("!12sB3xHH16s", packet[24:60])
        told = ipaddress.IPv6Address(sender)
        refuse = 12 if str(told.ipv4_mapped or told) != client else self.refuse
        outer, granted = wanted, 30
        if not refuse:
            outer, granted = self.open(client, inner, wanted, lifetime, now)
        outside = b"\0" * 10 + b"\xff\xff" + self.outside.packed
        head = struct.pack("!BBBBII12x", 2, 129, 0, refuse, granted, int(now - self.started))
        return head + struct.pack("!12sB3xHH16s", nonce, protocol, inner, outer, outside)


# In a namespace.


class Udp(asyncio.DatagramProtocol):
    def __init__(self, answer):
        self._answer = answer

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, addr):
        answer = self._answer(data, addr[0])
        if answer is not None:
            self._transport.sendto(answer, addr)


def nft(text):
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def opened(outer, ip, inner):
    """The rule goes to a chain of our own in front of the router's."""
    nft(f"add rule ip portmap pre iifname wan tcp dport {outer} dnat to {ip}:{inner}\n")
    nft("add rule ip filter forward iifname wan ct status dnat accept\n")
    sys.stdout.write(f"opened {outer} {ip}:{inner}\n")
    sys.stdout.flush()


def closed(outer, ip, inner):
    rules = subprocess.run(["nft", "-a", "list", "chain", "ip", "portmap", "pre"], capture_output=True, text=True)
    (handle,) = re.findall(rf"dport {outer} dnat .* # handle (\d+)", rules.stdout)
    nft(f"delete rule ip portmap pre handle {handle}\n")
    sys.stdout.write(f"closed {outer} {ip}:{inner}\n")
    sys.stdout.flush()


DESCRIPTION = f"""<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device>
<deviceType>{IGD}</deviceType><friendlyName>lab</friendlyName><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<serviceId>urn:upnp-org:serviceId:WANCommonIFC1</serviceId><controlURL>/common</controlURL>
<eventSubURL>/e</eventSubURL><SCPDURL>/c.xml</SCPDURL></service></serviceList><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList><service>
<serviceType>{WAN_IP}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>
<controlURL>/control</controlURL><eventSubURL>/e</eventSubURL><SCPDURL>/i.xml</SCPDURL>
</service></serviceList></device></deviceList></device></deviceList></device></root>"""


class Igd:
    """SSDP and SOAP over the same table."""

    def __init__(self, router, lan):
        self._router = router
        self._lan = lan
        self.http_port = 0

    def search(self, data, _client):
        wanted = re.search(rb"(?im)^ST:\s*(\S+)", data)
        if not data.startswith(b"M-SEARCH") or wanted is None or wanted[1].decode() not in (IGD, "upnp:rootdevice"):
            return None
        return (
            f"HTTP/1.1 200 OK\r\nST: {wanted[1].decode()}\r\nUSN: uuid:lab::{IGD}\r\nEXT:\r\nSERVER: lab\r\n"
            f"CACHE-CONTROL: max-age=60\r\nLOCATION: http://{self._lan}:{self.http_port}/d.xml\r\n\r\n"
        ).encode()

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            size = re.search(r"(?im)^content-length:\s*(\d+)", head)
            body = (await reader.readexactly(int(size[1]))).decode() if size else ""
            if head.startswith("GET"):
                status, answer = 200, DESCRIPTION
            else:
                status, answer = self._soap(head, body, writer.get_extra_info("peername")[0])
            raw = answer.encode()
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: text/xml\r\nContent-Length: {len(raw)}\r\n".encode())
            writer.write(b"Connection: close\r\n\r\n" + raw)
            await writer.drain()
        writer.close()

    def _soap(self, head, body, client):
        action = re.search(r'(?im)^soapaction:\s*"[^"#]*#(\w+)"', head)[1]
        found = dict(re.findall(r"<(New\w+)[^>]*>([^<]*)<", body))
        router, now = self._router, time.monotonic()
        if action == "GetExternalIPAddress":
            return _reply(action, f"<NewExternalIPAddress>{router.outside}</NewExternalIPAddress>")
        if action == "GetStatusInfo":
            status = "<NewConnectionStatus>Connected</NewConnectionStatus>"
            return _reply(action, f"{status}<NewLastConnectionError>0</NewLastConnectionError><NewUptime>9</NewUptime>")
        if action == "AddPortMapping":
            if router.refuse:
                return _fault(router.refuse)
            lifetime = int(found["NewLeaseDuration"])
            if lifetime and router.lifetime == 0:
                return _fault(725)
            if found["NewInternalClient"] != client:
                return _fault(606)
            router.open(client, int(found["NewInternalPort"]), int(found["NewExternalPort"]), lifetime or 1 << 30, now)
            return _reply(action, "")
        if action == "DeletePortMapping":
            router.close(int(found["NewExternalPort"]))
            return _reply(action, "")
        return _fault(401)


def _reply(action, inner):
    body = f'<u:{action}Response xmlns:u="{WAN_IP}">{inner}</u:{action}Response>'
    return 200, _envelope(body)


def _fault(code):
    detail = f'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{code}</errorCode></UPnPError>'
    fault = f"<faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>{detail}</detail>"
    return 500, _envelope(f"<s:Fault>{fault}</s:Fault>")


def _envelope(body):
    return (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        f's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>{body}</s:Body></s:Envelope>'
    )


async def run(lan, outside, speak, refuse, lifetime):
    import socket

    nft("table ip portmap { chain pre { type nat hook prerouting priority dstnat - 1; }\n}\n")
    router = Router(outside, speak=speak, refuse=refuse, lifetime=lifetime, opened=opened, closed=closed)
    router.started = time.monotonic()
    loop = asyncio.get_running_loop()

    def answer(data, client):
        return router.answer(data, client, time.monotonic())

    await loop.create_datagram_endpoint(lambda: Udp(answer), local_addr=(lan, PORT))
    if "igd" in speak:
        igd = Igd(router, lan)
        server = await asyncio.start_server(igd.serve, lan, 0)
        igd.http_port = server.sockets[0].getsockname()[1]
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(SSDP)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(SSDP[0]) + socket.inet_aton(lan))
        await loop.create_datagram_endpoint(lambda: Udp(igd.search), sock=sock)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        await asyncio.sleep(0.2)
        router.expire(time.monotonic())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lan")
    parser.add_argument("outside")
    parser.add_argument("--speak", default="pcp,pmp")
    parser.add_argument("--refuse", type=int, default=0)
    parser.add_argument("--lifetime", type=int, default=7200)
    chosen = parser.parse_args()
    asyncio.run(run(chosen.lan, chosen.outside, chosen.speak.split(","), chosen.refuse, chosen.lifetime))
