//! The socket of the data plane: its buffers, and packets larger than Ethernet's.
//!
//! Larger packets are the cheapest speed there is: sealing, sending and receiving cost by the packet. A
//! path is tried for packets up to [`super::DataConfig::mtu`] (RFC 8899), so a network of jumbo frames is
//! used as such, and the loopback interface as well.
//!
//! quinn hands the kernel up to ten packets at once as one send that is divided there (UDP_SEGMENT). Ten
//! of more than 6,550 bytes are more than a send may have, 65,507 bytes; the kernel refuses, and all ten
//! would be lost without a word. So what is too much for one send goes in two.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

use super::DataConfig;

/// The most bytes of one send over UDP, by either version of IP.
const MAX_SEND: usize = 65_507;

/// Opens the socket with the buffers that QUIC at speed wants: one socket carries all connections, and
/// the default of some 200 KiB is 150 packets.
///
/// # Errors
/// When the address cannot be listened on.
pub fn open(config: &DataConfig) -> io::Result<UdpSocket> {
    let domain = Domain::for_address(config.listen);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    let asked = config.socket_buffer;
    socket.set_recv_buffer_size(asked)?;
    socket.set_send_buffer_size(asked)?;
    // Linux reports twice what it grants, for its own bookkeeping (socket(7)).
    let (receive, send) = (socket.recv_buffer_size()? / 2, socket.send_buffer_size()? / 2);
    if receive < asked || send < asked {
        warn!(
            asked,
            receive,
            send,
            "the kernel grants smaller socket buffers than asked for: transfers may lose packets; \
             raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    socket.bind(&config.listen.into())?;
    Ok(socket.into())
}

/// The socket as quinn is to use it. Must be called within a runtime of tokio.
///
/// # Errors
/// When the system does not let it be used so.
pub fn for_quinn(socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    Ok(Arc::new(InTwo { inner: TokioRuntime.wrap_udp_socket(socket)? }))
}

/// A socket that sends in two what is too much for one send.
struct InTwo {
    inner: Arc<dyn AsyncUdpSocket>,
}

impl fmt::Debug for InTwo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InTwo").field(&self.inner).finish()
    }
}

/// How many bytes of whole packets of this size one send takes; one packet at least.
const fn at_once(packet: usize) -> usize {
    let packet = if packet == 0 { 1 } else { packet };
    let packets = MAX_SEND / packet;
    if packets == 0 { packet } else { packets * packet }
}

impl AsyncUdpSocket for InTwo {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(packet) = transmit.segment_size.filter(|_| transmit.contents.len() > MAX_SEND)
        else {
            return self.inner.try_send(transmit);
        };
        // Where the second finds no room all is tried again: then some packets come twice, which
        // their receiver drops, instead of not at all.
        transmit.contents.chunks(at_once(packet)).try_for_each(|contents| {
            let segment_size = (contents.len() > packet).then_some(packet);
            let Transmit { destination, ecn, src_ip, .. } = *transmit;
            self.inner.try_send(&Transmit { destination, ecn, contents, segment_size, src_ip })
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_send_has_whole_packets_and_no_more_than_it_may() {
        for packet in [1, 1_200, 1_452, 6_550, 6_551, 8_952, 32_753, 32_754, MAX_SEND] {
            let bytes = at_once(packet);
            assert!(bytes.is_multiple_of(packet) && bytes <= MAX_SEND, "{packet}");
            assert!(bytes + packet > MAX_SEND, "{packet}: one more would do");
        }
        assert_eq!(at_once(MAX_SEND + 1), MAX_SEND + 1);
        assert_eq!(at_once(0), MAX_SEND);
    }
}
