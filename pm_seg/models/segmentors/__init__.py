from .distilled_encoder_decoder import DistilledEncoderDecoder

__all__ = ['DistilledEncoderDecoder']
